"""Every op in plain torch: the definition, the oracle of faster specs, and enough to serve with."""
