"""The Hub: one client with retries, its errors in plain words, fetching a repo."""
