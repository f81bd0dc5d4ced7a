"""What an adapter computes on its base: recorded once, kept beside it, used again while nothing has changed."""
