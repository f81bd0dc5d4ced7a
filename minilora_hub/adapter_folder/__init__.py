"""The format of an adapter folder: file names, documents, hashes, reading and writing."""
