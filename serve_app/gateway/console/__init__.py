"""The console: pages for people, rendered here, without a build step."""
