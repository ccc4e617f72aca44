"""An offline kit: everything that a machine without a network needs to install medseg-trt, in parts with digests."""
