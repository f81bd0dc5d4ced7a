"""Publishing: build, check, upload and verify an adapter; list and describe those on the Hub."""
