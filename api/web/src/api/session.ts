// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Who is signed in. The ticket lives in the cookie that the API reads; the rest in localStorage, so that a link
// opened in a new tab is signed in too.

/** A signed-in user. */
export interface Session {
  username: string;
  csrf: string;
  /** Unix seconds when the ticket was issued. */
  issued: number;
  /** Privileges by area, such as vms.VM.Allocate; absent when the API does not tell. */
  capabilities?: Record<string, Record<string, number>>;
}

/** The answer of POST /access/ticket. */
export interface TicketAnswer {
  username: string;
  ticket: string;
  CSRFPreventionToken: string;
  cap?: Record<string, Record<string, number>>;
  NeedTFA?: number;
}

const STORAGE_KEY = 'atoll.session';
const COOKIE = 'PVEAuthCookie';

type Listener = () => void;

class SessionStore {
  current: Session | null = read();
  /** Why the last session ended, for the sign-in form. */
  endReason: string | null = null;
  private listeners = new Set<Listener>();

  subscribe = (listener: Listener): (() => void) => {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  };

  snapshot = (): Session | null => this.current;

  /** Takes over a ticket that the API issued. */
  begin(answer: TicketAnswer): void {
    const secure = location.protocol === 'https:' ? '; Secure' : '';
    document.cookie = `${COOKIE}=${encodeURIComponent(answer.ticket)}; Path=/; SameSite=Strict${secure}`;
    this.endReason = null;
    this.replace({
      username: answer.username,
      csrf: answer.CSRFPreventionToken,
      issued: Math.floor(Date.now() / 1000),
      ...(answer.cap ? { capabilities: answer.cap } : {}),
    });
  }

  end(reason: string | null): void {
    if (!this.current) return;
    document.cookie = `${COOKIE}=; Path=/; SameSite=Strict; Max-Age=0`;
    this.endReason = reason;
    this.replace(null);
  }

  private replace(next: Session | null): void {
    this.current = next;
    if (next) localStorage.setItem(STORAGE_KEY, JSON.stringify(next));
    else localStorage.removeItem(STORAGE_KEY);
    for (const listener of this.listeners) listener();
  }

  /** Another tab signed in or out. */
  adopt(): void {
    this.current = read();
    for (const listener of this.listeners) listener();
  }
}

/** The ticket in the cookie, if there is one. */
export function cookieTicket(): string | undefined {
  const pair = document.cookie.split('; ').find((entry) => entry.startsWith(`${COOKIE}=`));
  return pair && decodeURIComponent(pair.slice(COOKIE.length + 1));
}

function read(): Session | null {
  try {
    const stored = localStorage.getItem(STORAGE_KEY);
    return stored && cookieTicket() ? (JSON.parse(stored) as Session) : null;
  } catch {
    return null;
  }
}

export const session = new SessionStore();

window.addEventListener('storage', (event) => {
  if (event.key === STORAGE_KEY) session.adopt();
});
