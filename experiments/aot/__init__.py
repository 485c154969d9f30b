"""Ahead-of-time compilation for pods of TPUs; see __main__.py."""
