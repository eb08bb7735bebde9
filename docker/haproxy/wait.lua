-- For about a second after a start or a reload the proxy knows no replica, because addresses and first checks are still missing.
-- A request then waits, up to two seconds, instead of getting a 503.
core.register_action("wait_for_replica", { "http-req" }, function(transaction)
  for _ = 1, 40 do
    if transaction.f:nbsrv("replicas") > 0 then
      return
    end
    core.msleep(50)
  end
end)
