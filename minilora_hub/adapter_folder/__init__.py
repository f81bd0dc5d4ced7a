"""What an adapter folder is: file names, documents, hashes, one reader, one writer."""
