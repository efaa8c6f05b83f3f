"""An agent that answers a shop's mails, and asks a person before it pays back more than a little."""
