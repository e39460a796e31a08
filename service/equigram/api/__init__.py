"""The service: jobs over HTTP, their drivers on Ray, and a page to watch them."""
