"""What engines share whose library has a generator of its own, with batching and a paged cache."""
