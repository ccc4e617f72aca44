"""A server: Open Inference Protocol, images in and masks out, DICOM and DICOMweb, from one process."""
