"""Recipe that trains the embedded test models shipped in ``masq/models/zoo``."""
