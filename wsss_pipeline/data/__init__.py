"""Classes, labels and images: the only place that decodes files of the user's."""
