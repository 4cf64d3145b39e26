"""What pruning passes share: criteria, allocation of cuts, calibration samples, repair."""
