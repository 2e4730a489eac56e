"""Methods whose change of a weight is of low rank: y ← y + (x · down) · up. One file each, on `base`."""
