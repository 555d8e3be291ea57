"""Methods that survey section 2.2 names first: several learners, or several branches of one, teach each other."""
