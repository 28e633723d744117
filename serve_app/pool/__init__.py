"""The pool: what is wanted, what runs, and the loop that brings the one to the other."""
