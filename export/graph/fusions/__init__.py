"""One rule a module: each replaces one pattern of nodes by a node of domain ``medseg``."""
