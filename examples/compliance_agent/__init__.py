"""A Pydantic AI agent that checks installed packages against a policy; see README.md."""
