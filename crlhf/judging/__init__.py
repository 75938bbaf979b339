"""`python -m crlhf judge`: blind pairs, judged by a language model or by people, and how far to trust them."""
