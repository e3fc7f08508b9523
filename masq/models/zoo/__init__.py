"""Small trained models that ship with masq, for tests and for trying methods without a download."""
