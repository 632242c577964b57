"""INT8: observe, choose ranges, repair, place Q/DQ for a target, prove. The figure of merit is the network's output."""
