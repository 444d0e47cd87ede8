"""A process that holds one model and turns each chat request into a stream of chat events."""
