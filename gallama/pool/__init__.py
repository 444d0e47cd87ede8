"""Workers from the gateway's side: started, watched, picked, and asked."""
