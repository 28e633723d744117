"""What only an admin's key may do over HTTP."""
