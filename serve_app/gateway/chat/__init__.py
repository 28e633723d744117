"""OpenAI's shape in and out: request bodies, checks, answers, streams."""
