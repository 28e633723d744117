"""A machine before its first configuration: what is there, which pool fits, what would fail.

`hardware`, `engines` and `providers` look; `propose` chooses, from `hub` where nothing was found;
`writing` makes the commented file; `checks` and `setting_checks` are what `atlas doctor` tells.
Nothing here starts Ray or an engine, and looking contacts loopback addresses only.
"""
