"""KV blocks of programs whose calls have ended."""
