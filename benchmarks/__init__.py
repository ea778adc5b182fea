"""Side by side with the peers, in one run, as ratios; run by hand, never in tests."""
