"""One method, one file: `<section>/<slug with _ for ->.py`. The file system is the catalogue."""
