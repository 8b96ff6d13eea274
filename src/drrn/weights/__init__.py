"""Weights on disk: ours, the ports', Caffe's; export."""
