"""What calls may contain: parameters, their formats, and the options of a VM."""
