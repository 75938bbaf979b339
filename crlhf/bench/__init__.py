"""How fast it is (`python -m crlhf benchmark`), and what it needs (`python -m crlhf memory`)."""
