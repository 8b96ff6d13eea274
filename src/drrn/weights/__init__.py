"""Weights on disk: ours, the ports', Caffe's, MATLAB's; export."""
