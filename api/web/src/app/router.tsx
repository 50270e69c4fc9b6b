// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Every page and its address. Dialogs that can be linked to (wizard, task log) are search parameters of any page.
import { createRootRoute, createRoute, createRouter, lazyRouteComponent, Outlet, redirect } from '@tanstack/react-router';

import { session } from '../api/session';
import { DatacenterPage } from './DatacenterPage';
import { ErrorPage, NotFoundPage } from './ErrorPage';
import { Shell } from './Shell';
import { SignIn } from './SignIn';
import { GuestPage } from '../guest/GuestPage';
import { NodePage } from '../node/NodePage';
import { StoragePage } from '../storage/StoragePage';

/** Search parameters of every signed-in page. */
export interface PageSearch {
  /** UPID of the task whose log is open. */
  task?: string;
  /** The open wizard, and the node it starts with. */
  create?: 'vm' | 'ct';
  on?: string;
}

function pageSearch(search: Record<string, unknown>): PageSearch {
  const text = (name: string) => (typeof search[name] === 'string' && search[name] ? (search[name] as string) : undefined);
  const task = text('task');
  const on = text('on');
  const create = search['create'] === 'vm' || search['create'] === 'ct' ? search['create'] : undefined;
  return { ...(task ? { task } : {}), ...(create ? { create } : {}), ...(on ? { on } : {}) };
}

function requireSession({ location }: { location: { href: string } }): void {
  if (!session.current) throw redirect({ to: '/signin', search: location.href === '/' ? {} : { next: location.href } });
}

const root = createRootRoute({ component: Outlet, errorComponent: ErrorPage, notFoundComponent: NotFoundPage });

const signIn = createRoute({
  getParentRoute: () => root,
  path: '/signin',
  component: SignIn,
  validateSearch: (search: Record<string, unknown>): { next?: string } =>
    // Only addresses of this page: "//host" and "/\\host" would leave it.
    typeof search['next'] === 'string' && /^\/(?![/\\])/.test(search['next']) ? { next: search['next'] } : {},
});

const console_ = createRoute({
  getParentRoute: () => root,
  path: '/console/$vmid',
  beforeLoad: requireSession,
  component: lazyRouteComponent(() => import('../terminal/ConsoleWindow'), 'ConsoleWindow'),
});

const shell = createRoute({ getParentRoute: () => root, id: 'shell', beforeLoad: requireSession, component: Shell, validateSearch: pageSearch });
const datacenter = createRoute({ getParentRoute: () => shell, path: '/', component: DatacenterPage });
const datacenterTab = createRoute({ getParentRoute: () => shell, path: '/datacenter/$tab', component: DatacenterPage });
const node = createRoute({ getParentRoute: () => shell, path: '/nodes/$node', component: NodePage });
const nodeTab = createRoute({ getParentRoute: () => shell, path: '/nodes/$node/$tab', component: NodePage });
const storage = createRoute({ getParentRoute: () => shell, path: '/nodes/$node/storage/$storage', component: StoragePage });
const storageTab = createRoute({ getParentRoute: () => shell, path: '/nodes/$node/storage/$storage/$tab', component: StoragePage });
const guest = createRoute({ getParentRoute: () => shell, path: '/guests/$vmid', component: GuestPage });
const guestTab = createRoute({ getParentRoute: () => shell, path: '/guests/$vmid/$tab', component: GuestPage });

const routeTree = root.addChildren([
  signIn,
  console_,
  shell.addChildren([datacenter, datacenterTab, node, nodeTab, storage, storageTab, guest, guestTab]),
]);

export const router = createRouter({ routeTree, defaultNotFoundComponent: NotFoundPage });

declare module '@tanstack/react-router' {
  interface Register {
    router: typeof router;
  }
}
