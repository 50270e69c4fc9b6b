// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Keeps whoever is signed in signed in: a ticket is traded for a fresh one long before its two hours are over.
import { ApiError, call } from './client';
import { cookieTicket, session, type TicketAnswer } from './session';

const RENEW_SECONDS = 15 * 60;
const RETRY_SECONDS = 30;

let timer: ReturnType<typeof setTimeout> | undefined;

function schedule(seconds: number): void {
  clearTimeout(timer);
  timer = setTimeout(() => void renew(), Math.max(0, seconds) * 1000);
}

async function renew(): Promise<void> {
  const username = session.current?.username;
  const password = cookieTicket();
  if (!username || !password) return session.end('Your session has ended; sign in again.');
  try {
    session.begin(await call<TicketAnswer>('POST', '/access/ticket', { username, password }));
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return session.end('Your session has ended; sign in again.');
    // The node is away for a moment; the old ticket has time to live.
    schedule(RETRY_SECONDS);
  }
}

function follow(): void {
  clearTimeout(timer);
  if (session.current) schedule(RENEW_SECONDS - (Date.now() / 1000 - session.current.issued));
}

/** Starts renewing, for the life of the page. */
export function keepSignedIn(): void {
  session.subscribe(follow);
  follow();
}
