"""Methods that merge, one file each, and what they share: task vectors read part by part, the merged model written."""
