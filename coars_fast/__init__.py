"""coars_fast: train a recommender agent and a user agent from the conversations that they have with each other."""

__version__ = "0.1.0"
