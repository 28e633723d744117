"""Operations of an OpenAPI 3 file as functions."""
