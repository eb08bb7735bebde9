-- For about a second after a start or a reload the proxy knows no replica: their addresses and first checks are still to come.
-- Who comes then waits, up to two seconds, instead of a 503.
core.register_action("wait_for_replica", { "http-req" }, function(transaction)
  for _ = 1, 40 do
    if transaction.f:nbsrv("replicas") > 0 then
      return
    end
    core.msleep(50)
  end
end)
