"""One rank: device memory, the rows' state, the forward pass, sampling."""
