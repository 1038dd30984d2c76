"""The engine that fills a mask set, by any method or a network, on threads, a GPU or a cluster."""
