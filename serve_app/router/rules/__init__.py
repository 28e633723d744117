"""The rules that answer which candidate a request gets."""
