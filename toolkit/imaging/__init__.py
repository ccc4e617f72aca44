"""Images and masks: files of every format, preprocessing, segmentation of one image, overlays."""
