"""Learning prompts: what they are learned by, from and how; the prompts themselves are in ``clip``."""
