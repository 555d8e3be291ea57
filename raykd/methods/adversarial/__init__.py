"""Methods that survey section 3.5 names first: a critic tells teacher from student."""
