"""Catalogues, histories, splits, candidates and peers."""
