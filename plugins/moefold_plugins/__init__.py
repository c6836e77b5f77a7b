"""The built-in stages and codecs; each file is one entry point, as a third party's would be."""
