"""Publishing: build, check, describe, send and prove an adapter; find and describe others."""
