"""Stage one's engine: from images and labels to a mask set, by any method, on threads, a GPU or a cluster."""
