// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tests of accounts, tokens and rules through the store.

use super::*;
use crate::store::MemoryStore;

fn access() -> Access {
    Access::new(Arc::new(MemoryStore::new()))
}

fn user(id: &str) -> UserId {
    id.parse().unwrap()
}

/// The text of an error, or nothing.
fn text(result: Result<(), Error>) -> String {
    match result {
        Err(Error::Invalid(errors)) => format!("{}: {}", errors[0].0, errors[0].1),
        Err(error) => error.to_string(),
        Ok(()) => String::new(),
    }
}

#[derive(Debug)]
struct Host;

#[async_trait]
impl PasswordVerifier for Host {
    async fn verify(&self, name: &str, password: &str) -> Result<bool, Error> {
        Ok(name == "root" && password == "toor")
    }
}

#[tokio::test]
async fn the_first_administrator_signs_in() {
    let access = access();
    let admin = user("admin@pve");
    let password = access.create_administrator(&admin).await.unwrap().unwrap();
    assert_eq!(access.create_administrator(&admin).await.unwrap(), None);
    access.verify_password(&admin, &password).await.unwrap();
    let wrong = access.verify_password(&admin, "nonsense").await;
    assert_eq!(text(wrong), AUTHENTICATION_FAILURE);
    let nobody = access.verify_password(&user("x@pve"), &password).await;
    assert_eq!(text(nobody), AUTHENTICATION_FAILURE);
    let identity = Identity::from(admin.clone());
    assert_eq!(
        access.privileges(&identity, "/vms/100").unwrap(),
        PrivilegeSet::FULL
    );
    let off = UserChange {
        enabled: Some(false),
        ..UserChange::default()
    };
    access.update_user(&admin, off).await.unwrap();
    let disabled = access.verify_password(&admin, &password).await;
    assert_eq!(text(disabled), AUTHENTICATION_FAILURE);
}

#[tokio::test]
async fn realm_pam_asks_the_host() {
    let access = access();
    let root = user("root@pam");
    assert!(access.verify_password(&root, "toor").await.is_err());
    access.set_verifier(Arc::new(Host));
    access.verify_password(&root, "toor").await.unwrap();
    assert!(access.verify_password(&root, "x").await.is_err());
    let refused = access.set_password(&root, "longenough").await;
    assert!(text(refused).contains("set it with passwd"));
}

#[tokio::test]
async fn tokens_are_made_used_and_removed() {
    let access = access();
    let admin = user("admin@pve");
    access.create_administrator(&admin).await.unwrap();
    let change = TokenChange {
        separate: Some(false),
        ..TokenChange::default()
    };
    let secret = access
        .create_token(&admin, "ci", change.clone())
        .await
        .unwrap();
    let again = access.create_token(&admin, "ci", change).await.map(drop);
    assert_eq!(text(again), "tokenid: Token already exists.");
    let identity: Identity = "admin@pve!ci".parse().unwrap();
    access.verify_token(&identity, &secret).unwrap();
    assert!(access.verify_token(&identity, "guess").is_err());
    assert!(
        access
            .privileges(&identity, "/")
            .unwrap()
            .contains(Privilege::SysModify)
    );
    let stored = access
        .shared
        .store
        .get(edit::TOKEN_SECRETS)
        .unwrap()
        .unwrap();
    assert!(!String::from_utf8_lossy(&stored.value).contains(&secret));
    let fresh = access.regenerate_token(&admin, "ci").await.unwrap();
    assert!(access.verify_token(&identity, &secret).is_err());
    access.verify_token(&identity, &fresh).unwrap();
    access.delete_token(&admin, "ci").await.unwrap();
    assert!(access.verify_token(&identity, &fresh).is_err());
}

#[tokio::test]
async fn users_groups_roles_and_rules() {
    let access = access();
    let (eve, plain) = (user("eve@pve"), UserChange::default());
    access
        .create_user(&eve, plain.clone(), Some("long enough"))
        .await
        .unwrap();
    access.verify_password(&eve, "long enough").await.unwrap();
    let again = access.create_user(&eve, plain.clone(), None).await;
    assert_eq!(
        text(again),
        "create user failed: user 'eve@pve' already exists"
    );
    let short = access
        .create_user(&user("b@pve"), plain.clone(), Some("short"))
        .await;
    assert!(text(short).starts_with("password: "));
    let ldap = access.create_user(&user("b@ldap"), plain, None).await;
    assert_eq!(
        text(ldap),
        "create user failed: domain 'ldap' does not exist"
    );
    access.create_group("ops", "").await.unwrap();
    let join = UserChange {
        groups: Some(["ops".to_owned()].into()),
        ..UserChange::default()
    };
    access.update_user(&eve, join).await.unwrap();
    let set = parse_privileges("VM.Audit VM.PowerMgmt").unwrap();
    access.create_role("Starter", set).await.unwrap();
    let mut change = RuleChange {
        path: "/vms/".into(),
        roles: vec!["Starter".into()],
        subjects: vec![Subject::Group("ops".into())],
        propagate: true,
        delete: false,
    };
    access.update_rules(&change).await.unwrap();
    let identity = Identity::from(eve.clone());
    assert_eq!(access.privileges(&identity, "/vms/7").unwrap(), set);
    change.delete = true;
    access.update_rules(&change).await.unwrap();
    assert!(access.privileges(&identity, "/vms/7").unwrap().is_empty());
    change.delete = false;
    change.roles = vec!["Nothing".into()];
    assert_eq!(
        text(access.update_rules(&change).await),
        "role 'Nothing' does not exist"
    );
    assert_eq!(
        text(access.delete_role("PVEAdmin").await),
        "auto-generated role 'PVEAdmin' cannot be deleted"
    );
    assert_eq!(
        text(access.delete_group("x").await),
        "delete group failed: group 'x' does not exist"
    );
    access.delete_user(&eve).await.unwrap();
    assert!(access.config().unwrap().groups["ops"].users.is_empty());
    assert!(access.verify_password(&eve, "long enough").await.is_err());
}

#[tokio::test]
async fn changes_at_the_same_time_all_arrive() {
    let access = access();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..8 {
        let access = access.clone();
        tasks.spawn(async move { access.create_group(&format!("g{number}"), "").await });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap().unwrap();
    }
    assert_eq!(access.config().unwrap().groups.len(), 8);
}
