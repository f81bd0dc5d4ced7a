"""Access to the Hub: a client with retries, error messages, and downloads."""
